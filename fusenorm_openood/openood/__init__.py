"""Everything taken from OpenOOD: base class, postprocessor, registration, pipelines."""

INSTALL = "bash scripts/install_openood.sh"
