"""Mutants: changes of the kernel's and the model's sources by rule, which the judge has to notice."""
