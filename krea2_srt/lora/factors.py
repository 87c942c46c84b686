"""From what a file has for one matrix to a factor of it."""

from torch import Tensor

from krea2_srt.errors import AdapterError
from krea2_srt.lora.adapter import Factor
from krea2_srt.lora.limits import Limits
from krea2_srt.lora.lokr import lokr_dim, lokr_factors, lokr_shape
from krea2_srt.lora.peft_config import PeftConfig
from krea2_srt.lora.stored import StoredModule


def read_factor(
    module: StoredModule, peft: PeftConfig | None, limits: Limits, alpha: float | None
) -> Factor:
    """Read one matrix's tensors, with their scale.

    The scale is alpha / rank, where alpha is the file's own, else PEFT's config's, else what is
    given, else the rank.

    Args:
        module: the tensors.
        peft: PEFT's config, if there is one.
        limits: of the rank.
        alpha: what is given.

    Raises:
        AdapterError: some are missing, or do not fit the matrix or one another.
    """
    roles = module.roles
    if roles == {"down", "up"}:
        down, up, scale = _lora(module, peft, limits, alpha)
    elif roles and all(role.startswith("lokr") for role in roles):
        down, up, scale = _lokr(module, peft, limits, alpha)
    else:
        raise AdapterError(_incomplete(module))
    up = up * scale
    if not up.isfinite().all():
        raise AdapterError(f"{module.key()}, multiplied by its scale of {scale:g}, is not finite")
    return Factor(down, up, module.matrix.start)


def _incomplete(module: StoredModule) -> str:
    if lokr := sorted(role for role in module.roles if role.startswith("lokr")):
        other = min(module.roles - set(lokr))
        return f"{module.key(other)} and {module.key(lokr[0])} are of the same matrix"
    if not module.roles:
        return f"{module.key('alpha')} has no factors beside it"
    (there,) = module.roles
    missing = "down" if there == "up" else "up"
    return f"{module.key(there)} has no {missing} factor beside it"


def _lora(
    module: StoredModule, peft: PeftConfig | None, limits: Limits, given: float | None
) -> tuple[Tensor, Tensor, float]:
    out, width = module.matrix.shape
    down, up = module.shapes["down"], module.shapes["up"]
    if len(down) != 2 or down[1] != width:
        raise AdapterError(f"{module.key('down')}: {_shape(down)}, expected [rank, {width}]")
    if len(up) != 2 or up[0] != out:
        raise AdapterError(f"{module.key('up')}: {_shape(up)}, expected [{out}, rank]")
    rank = down[0]
    if up[1] != rank:
        raise AdapterError(f"{module.key('down')} has rank {rank}, {module.key('up')} {up[1]}")
    _check_rank(rank, module, limits)
    alpha = module.alpha()
    if alpha is not None:
        scale = alpha / rank
    elif peft is not None:
        scale = peft.scale(module.name, rank)
    else:
        scale = 1.0 if given is None else given / rank
    return module.tensor("down"), module.tensor("up"), scale


def _lokr(
    module: StoredModule, peft: PeftConfig | None, limits: Limits, given: float | None
) -> tuple[Tensor, Tensor, float]:
    if peft is not None:
        raise AdapterError(f"{module.key()} is of a LoKr, PEFT's config is a LoRA's")
    shapes = {role: module.shapes[role] for role in module.roles}
    try:
        out, width, rank = lokr_shape(shapes)
    except AdapterError as error:
        raise AdapterError(f"{module.key()}: {error}") from None
    if (out, width) != module.matrix.shape:
        raise AdapterError(
            f"{module.key()}: its product has {_shape((out, width))}, "
            f"expected {list(module.matrix.shape)}"
        )
    _check_rank(rank, module, limits)
    alpha, dim = module.alpha(), lokr_dim(shapes)
    alpha = given if alpha is None else alpha
    scale = 1.0 if alpha is None or dim is None else alpha / dim
    return *lokr_factors(module.tensor, shapes), scale


def _check_rank(rank: int, module: StoredModule, limits: Limits) -> None:
    if not 0 < rank <= limits.rank:
        raise AdapterError(f"{module.key()} has rank {rank}, expected 1 to {limits.rank}")


def _shape(shape: tuple[int, ...]) -> str:
    return f"shape {list(shape)}"
