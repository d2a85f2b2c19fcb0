"""Reading traced programs."""

from jax.extend.core import jaxprs_in_params


def equations(jaxpr):
    """All equations of a jaxpr, those of nested jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in jaxprs_in_params(equation.params):
            yield from equations(nested)
