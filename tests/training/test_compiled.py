"""Layers compiled one at a time: how many graphs, of what, and the same losses."""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from families import llamagen
from small import a_batch, family
from torch import nn
from torch._dynamo import lookup_backend

from zipar_train import ZipARModule
from zipar_train.data.batch import Batch
from zipar_train.models import compiled
from zipar_train.recipe.load import load_recipe
from zipar_train.training import optimizer as optimizers
from zipar_train.training.fsdp import fsdp_units
from zipar_train.training.trainer import module_of


@pytest.fixture
def graphs(monkeypatch):
    """The number of attentions in each graph that is compiled from now on, for autograd but not by Inductor."""
    found, real = [], torch.compile

    def backend(graph, inputs):
        parts = [
            part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)
        ]  # checkpoints have their own
        targets = [str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function"]
        found.append(sum("scaled_dot_product_attention" in target for target in targets))
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


TUNES = {
    "plain": [],
    "recompute": ["tune.activation_checkpointing=true"],
    "adapters": ["tune.lora={rank: 2, alpha: 4, targets: [q_proj, down_proj]}", "model.weights=x"],
    "both": [
        "tune.lora={rank: 2, alpha: 4, targets: [q_proj, down_proj]}",
        "model.weights=x",
        "tune.activation_checkpointing=true",
    ],
}


def step(module, batch, window):
    """A training step's loss and gradients."""
    module.zero_grad()
    module.model.train()
    loss = module.losses(batch, batch.condition, window)[0]
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in module.model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        *(("llamagen", tune) for tune in TUNES),
        ("lumina", "plain"),
        ("emu3", "recompute"),
        ("glm-image", "recompute"),
        ("janus", "plain"),
        ("simplear", "both"),
        ("llamagen-t2i", "plain"),
    ],
)
def test_a_layer_is_a_graph_that_all_layers_share(graphs, kind, tune):
    """Two lengths: a static graph and a dynamic one for four layers, and the steps are those without compilation."""
    found = {}
    for compiling in (False, True):
        more = [
            f"tune.compile={str(compiling).lower()}",
            "tune.distill=0",
            "zipar.windows={4: 1, 2: 1, 1: 1}",
            "data.val_windows=[2]",
        ]
        module = module_of(load_recipe("digits", [*TUNES[tune], *more]), family(kind, 4))
        torch.manual_seed(1)
        batch = a_batch(kind, module.family)
        windows = [module.family.grid.row_length, 2, 1, module.family.grid.row_length]
        found[compiling] = [step(module, batch, window) for window in windows]
        with torch.no_grad():
            module.model.eval()
            found[compiling].append((float(module.losses(batch, batch.condition, 2)[0]), []))
    assert len(module.plans.plan(1)) != len(module.plans.plan(module.family.grid.row_length))
    for plain, other in zip(*found.values(), strict=True):
        assert other[0] == pytest.approx(plain[0], rel=1e-6)
        for a, b in zip(plain[1], other[1], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert set(graphs) == {1}  # a graph is a layer
    first = 2 if "adapters" in tune or tune == "both" else 1  # where the embedding is frozen, no gradient goes below it
    assert len(graphs) <= 3 * first  # static, dynamic, validation; four layers of their own would make 12


def test_pytorchs_silence_past_the_limit_is_broken(graphs, capsys, monkeypatch):
    log = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(log, "handlers", [h for h in log.handlers if not isinstance(h, compiled.LimitTold)])
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 2)

    class Layer(nn.Module):
        def forward(self, x):
            return x + 1

    body = nn.Module()
    body.layers = nn.ModuleList(Layer() for _ in range(3))
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled.compile_layers(body, dynamic=False)
        for size in (1, 2, 3, 4):
            for layer in body.layers:
                layer(torch.zeros(size))
            assert capsys.readouterr().err.count("torch.compile has made 2 versions of a layer") == (size == 3)


@pytest.mark.slow
def test_compiled_layers_are_shared_among_devices(graphs):
    """FSDP's hooks run around compiled code: still a graph for all layers, and the gradients are the same."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    alone = ZipARModule(llamagen(4, 4, dtype=torch.float32), windows={2: 1})
    batch = Batch(torch.randint(7, (2, 16)), torch.tensor([0, 2]))
    expected = [step(alone, batch, window) for window in (4, 2)]
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        module = ZipARModule(llamagen(4, 4, dtype=torch.float32), windows={2: 1})
        compiled.compile_layers(module.model.model)
        for unit in fsdp_units(module.model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
        for (loss, gradients), window in zip(expected, (4, 2), strict=True):
            found, others = step(module, batch, window)
            assert found == pytest.approx(loss, rel=1e-6)
            assert all(isinstance(gradient, DTensor) for gradient in others)
            for a, b in zip(gradients, others, strict=True):
                assert torch.allclose(a, b.full_tensor(), rtol=1e-4, atol=1e-6)
        assert set(graphs) == {1} and len(graphs) <= 2
    finally:
        destroy_process_group()


def test_sharded_gradients_are_clipped_and_a_fused_step_is_taken(monkeypatch):
    """On DTensors as on whole tensors."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(optimizers, "fused", lambda device: True)
    batch = Batch(torch.randint(7, (2, 16)), torch.tensor([0, 2]))
    found = []
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for shared in (False, True):
            module = ZipARModule(llamagen(4, 4, dtype=torch.float32), windows={2: 1}, lr=1e-2)
            if shared:
                for unit in fsdp_units(module.model):
                    fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
            optimizer = module.optimizer()
            step(module, batch, 2)
            module._trainer = SimpleNamespace(
                strategy=SimpleNamespace(reduce=lambda loss, reduce_op: loss),
                precision_plugin=None,
                loggers=[],
                current_epoch=0,
                global_rank=0,
                accumulate_grad_batches=1,
                global_step=0,
            )
            module.log, module.parts = lambda *args, **more: None, [torch.zeros(1)]
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, 0.1, "norm")
            optimizer.step()
            whole = [p.full_tensor() if shared else p.detach() for p in module.model.parameters()]
            grads = [p.grad.full_tensor() if shared else p.grad for p in module.model.parameters()]
            found.append((float(module.norm), whole, grads))
    finally:
        destroy_process_group()
    (norm, weights, gradients), (other, others, theirs) = found
    assert norm == pytest.approx(other, rel=1e-5) and norm > 1
    assert float(torch.nn.utils.get_total_norm(theirs)) == pytest.approx(0.1, rel=1e-4)
    for a, b in zip(weights + gradients, others + theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
