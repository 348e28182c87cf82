"""Everything taken from OpenOOD: base class, postprocessor, registration, pipelines."""
