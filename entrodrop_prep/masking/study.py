"""What the project's study (docs/study.md) found about a recipe, in one line."""

from __future__ import annotations

from entrodrop_prep.config import Recipe

FEW, LEAST = 0.2, 0.1
"""Largest share of all inputs that counts as a few, and the smallest that was tried otherwise."""
FINDINGS = {
    "labels": "dropping labels of low-entropy tokens did next to nothing against overfitting",
    "other labels": "dropping labels of these tokens did little against overfitting",
    "inputs": "dropping inputs of low-entropy tokens helped only where training overfits strongly, and random tokens "
    "did at least as well",
    "other inputs": "dropping inputs at such rates helped only where training overfits strongly",
    "few inputs": "uniform replacement of 5 to 20% of the inputs at a constant rate did best of what was tried",
    "always": "dropping the same labels in every epoch raised the loss on held-out text",
    "none": "nothing like this recipe was tried",
}
_TRIED = {"low-entropy": "", "random": "other ", "high-entropy": "other "}


def finding(recipe: Recipe) -> str | None:
    """The line that ``materialize`` ends with.

    Args:
        recipe: the settings of the masks.

    Returns:
        What was found about the selection and target; None where nothing is dropped.
    """
    rates = recipe.rates or (recipe.max_rate,)
    if not any(rates) or recipe.quantile == 0:
        return None
    constant = recipe.schedule == "constant" and not recipe.rates
    share = (0.5 if recipe.quantile is None else recipe.quantile) * max(rates)
    kind = "labels" if recipe.target == "labels" else "inputs"
    if (recipe.select, recipe.target) in (("high-surprisal", "labels"), ("low-excess", "labels")) and constant:
        found = "always"
    elif (
        (recipe.select, recipe.target, recipe.drop_token) == ("random", "inputs", "uniform")
        and constant
        and share <= FEW
    ):
        found = "few inputs"
    elif recipe.select in _TRIED and (kind == "labels" or share >= LEAST):
        found = f"{_TRIED[recipe.select]}{kind}"
    else:
        found = "none"
    return f"study of models of 1M parameters: {FINDINGS[found]} (docs/study.md)"
