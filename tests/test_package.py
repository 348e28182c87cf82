import pkgutil
import subprocess
import sys

import fusenorm_openood


def test_every_public_name_is_importable():
    for name in fusenorm_openood.__all__:
        assert getattr(fusenorm_openood, name) is not None
        assert name in dir(fusenorm_openood)


def test_import_loads_neither_torch_nor_openood():
    code = (
        "import sys, fusenorm_openood; assert not {'torch', 'openood', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_name_is_also_a_module():
    modules = {module.name for module in pkgutil.iter_modules(fusenorm_openood.__path__)}
    assert not modules & set(fusenorm_openood.__all__)


def test_unknown_names_are_attribute_errors():
    assert not hasattr(fusenorm_openood, "nothing")
