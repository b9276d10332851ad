from tests import typechecker as typechecker  # jaxtyping names it by attribute, in pyproject.toml
