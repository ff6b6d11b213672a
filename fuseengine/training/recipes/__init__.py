"""What one optimiser step minimises: a module per system, a class per training stage."""

from __future__ import annotations

from collections.abc import Mapping

from fuseengine.errors import TrainingError, UnknownNameError
from fuseengine.models.base import FusionModel
from fuseengine.models.dmfuse import DMFuse
from fuseengine.models.dmnet import DMNet
from fuseengine.models.drfusion import DRFusion
from fuseengine.models.drmf import DRMF
from fuseengine.models.mask_difuser import MaskDiFuser
from fuseengine.training.recipes.base import Recipe
from fuseengine.training.recipes.dmfuse import DMFuseDiffusion, DMFuseFusion
from fuseengine.training.recipes.dmnet import DMNetFusion, DMNetReconstruction
from fuseengine.training.recipes.drfusion import DRFusionRecipe
from fuseengine.training.recipes.drmf import DRMFFusion, DRMFRefinement, DRMFRestoration
from fuseengine.training.recipes.mask_difuser import MaskDiFuserPairs, MaskDiFuserRecipe

_STAGES: dict[type[FusionModel], tuple[type[Recipe], ...]] = {
    DRFusion: (DRFusionRecipe,),
    MaskDiFuser: (MaskDiFuserRecipe, MaskDiFuserPairs),
    DMFuse: (DMFuseDiffusion, DMFuseFusion),
    DMNet: (DMNetReconstruction, DMNetFusion),
    DRMF: (DRMFRestoration, DRMFFusion, DRMFRefinement),
}


def stages_of(model: FusionModel) -> list[str]:
    """Names of the stages that a model is trained in, in order.

    Raises:
        TrainingError: the family has none.
    """
    return [recipe.stage for recipe in _recipes(model)]


def recipe_for(
    model: FusionModel,
    stage: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> Recipe:
    """The recipe of a model's family.

    Args:
        model: what is to be trained.
        stage: one of :func:`stages_of`; may be left out where there is one.
        weights: weights of the loss's terms that replace the recipe's own.

    Raises:
        TrainingError: the family has no recipe, or several stages and none was named.
        UnknownNameError: another stage, or a term that the recipe does not have.
    """
    stages = {recipe.stage: recipe for recipe in _recipes(model)}
    name = model.name or type(model).__name__
    if stage is None and len(stages) > 1:
        raise TrainingError(
            f"{name} is trained in stages; got none, expected one of {', '.join(stages)}, in this "
            "order: give stage='...'"
        )
    if stage is not None and stage not in stages:
        raise UnknownNameError(f"training stage of {name}", stage, stages)
    return stages[stage or next(iter(stages))](weights)


def _recipes(model: FusionModel) -> tuple[type[Recipe], ...]:
    for family, recipes in _STAGES.items():
        if isinstance(model, family):
            return tuple(recipe for recipe in recipes if recipe.suits(model))
    known = ", ".join(family.__name__ for family in _STAGES)
    raise TrainingError(f"no training recipe for {type(model).__name__}; there is one for {known}")
