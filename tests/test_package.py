import subprocess
import sys

import fusenorm_openood


def test_every_public_name_is_there():
    for name in fusenorm_openood.__all__:
        assert getattr(fusenorm_openood, name) is not None
        assert name in dir(fusenorm_openood)


def test_import_loads_neither_torch_nor_openood():
    code = (
        "import sys, fusenorm_openood; assert not {'torch', 'openood', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_function_atf_is_not_hidden_by_its_module():
    code = (
        "from fusenorm_openood import FuseNorm, atf\n"
        "import fusenorm_openood.atf\n"
        "from fusenorm_openood.atf import atf as same\n"
        "assert atf is same is fusenorm_openood.atf and callable(atf)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    assert not hasattr(fusenorm_openood, "nothing")
