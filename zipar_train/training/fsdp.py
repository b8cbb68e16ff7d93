"""Sharding of a model's weights among devices with FSDP2 (`torch.distributed.fsdp.fully_shard`)."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel


def fsdp_units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that FSDP shards as units: the layers of the body and the other parts with weights.

    The body itself is not a unit, because its embeddings are used before it is called.
    """
    body: Any = model.base_model
    parts = [*body.layers, *(part for part in body.children() if part is not body.layers)]
    parts += [part for part in model.children() if part is not body]
    return [part for part in parts if any(True for _ in part.parameters())]


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the weights of a model, by `fsdp_units`, among the devices of a mesh.

    The units share one communication context, so only one unit's gradients are unsharded at a time.
    """
    from torch.distributed.fsdp import fully_shard, share_comm_ctx

    units = fsdp_units(model)
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    share_comm_ctx(units)  # type: ignore[arg-type]
