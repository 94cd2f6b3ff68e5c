"""What target_modules means for models of PEFT, mixtures of experts and Hugging Face's ways of writing it;
stand-ins for their classes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.nn import SubspaceLayer


class LoraLinear(nn.Module):
    """A layer of PEFT: the frozen or trained base beside adapters, which it lists."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A")

    def __init__(self, width):
        super().__init__()
        self.base_layer = nn.Linear(width, width)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, width, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()


class SavedModule(nn.Module):
    """PEFT's wrapper of a module that it trains as a whole, in a copy."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module):
        super().__init__()
        self.original_module, self.modules_to_save = module, nn.ModuleDict({"default": copy.deepcopy(module)})
        self.original_module.requires_grad_(False)


class MixtralExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 24, 8)), nn.Parameter(torch.randn(4, 8, 12))
        self.bias = nn.Parameter(torch.randn(4, 24))


class Conv1D(nn.Module):
    """As the one of transformers, by which it is known."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    def __init__(self, attention, mlp):
        super().__init__()
        self.attn, self.mlp = attention, mlp


def projected(model, **options):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in lrk.param_groups(model, rank=2, **options)[1]["params"]]


def test_adapters_of_peft_are_left_out_unless_they_are_named():
    def model():
        return nn.ModuleDict({"q": LoraLinear(8), "o": nn.Linear(8, 8)})

    assert projected(model()) == ["q.base_layer.weight", "o.weight"]
    assert "q.lora_A.default.weight" in projected(model(), target_modules=["lora_A"])
    converted = lrk.to_subspace(model(), rank=2)
    assert [name for name, module in converted.named_modules() if isinstance(module, SubspaceLayer)] == ["q.base_layer", "o"]
    frozen = model()
    frozen.q.base_layer.requires_grad_(False), frozen.o.requires_grad_(False)
    with pytest.raises(ValueError, match="matches only frozen parameters"):
        lrk.param_groups(frozen, rank=2)


def test_modules_that_peft_trains_as_a_whole_are_projected_but_for_the_head():
    model = nn.ModuleDict({"mlp": SavedModule(nn.Sequential(nn.Linear(8, 8))), "lm_head": SavedModule(nn.Linear(8, 16))})
    assert projected(model) == ["mlp.modules_to_save.default.0.weight"]


def test_experts_are_linear_too():
    model = nn.ModuleDict({"experts": MixtralExperts(), "gate": nn.Linear(8, 4, bias=False), "position": nn.Embedding(1, 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert projected(model) == ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


def test_a_parameter_of_three_dimensions_is_not_always_an_expert():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.proj = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(8, 8)

    assert projected(nn.ModuleDict({"vision": Vision()})) == ["vision.proj.weight"]


@pytest.mark.parametrize(
    "spelling", ["all-linear", "all_linear", [r".*\.attn", r".*\.mlp"], ["attn", "mlp"], [r"\d\.(attn|mlp)"], r"0\.(attn|mlp)"]
)
def test_spellings(spelling):
    model = nn.Sequential(Block(nn.Linear(8, 8), nn.Linear(8, 12)))
    assert projected(model, target_modules=spelling) == ["0.attn.weight", "0.mlp.weight"]
    assert isinstance(lrk.to_subspace(model, rank=2, target_modules=spelling)[0].mlp, SubspaceLayer)


def test_a_part_of_a_name_need_not_be_a_regular_expression():
    with pytest.raises(ValueError, match="matches no module"):
        projected(nn.Sequential(Block(nn.Linear(8, 8), nn.Linear(8, 12))), target_modules=["(attn"])


def test_little_that_is_projected_is_said():
    model = nn.Sequential(Block(nn.Linear(8, 8), nn.Linear(8, 12)), nn.Conv2d(4, 8, 3))
    with pytest.warns(
        UserWarning, match=r"projects 14% of the elements of matrices; .* largest being 1.weight \(8, 4, 3, 3\), 0.mlp.weight"
    ) as caught:
        lrk.param_groups(model, rank=2, target_modules=["attn"])
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrk.param_groups(nn.ModuleDict({"embed": nn.Embedding(1000, 8), "layer": nn.Linear(8, 8), "lm_head": nn.Linear(8, 1000)}), rank=2)


def gpt(width=8):
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(12, width), nn.Tanh(), Conv1D(width, 12))


def test_conv1d_trains_as_the_linear_layer_that_it_is():
    """RSO on GPT-2's layers against the same ones with the weight stored the usual way: outputs, gradients,
    weights after many steps."""
    conv, linear = gpt(), gpt()
    for index in (0, 2):
        plain = nn.Linear(linear[index].nx, linear[index].nf)
        plain.weight.data, plain.bias.data = linear[index].weight.data.mT.clone(), linear[index].bias.data.clone()
        linear[index] = plain
    before = list(conv.state_dict())
    kinds = [type(layer) for layer in conv]
    optimizers = [
        lrk.RSOAdamW(lrk.to_subspace(model, rank=3).parameters(), lr=1e-2, inner_steps=3, weight_decay=0.1) for model in (conv, linear)
    ]
    assert list(conv.state_dict()) == before and "in_features=8, out_features=12, rank=3" in repr(conv)
    for _ in range(8):
        x, y = torch.randn(5, 8), torch.randn(5, 8)
        outputs = []
        for model, optimizer in zip((conv, linear), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            (outputs[-1] - y).square().mean().backward()
            optimizer.step()
        assert torch.allclose(*outputs, atol=1e-5)
        assert torch.allclose(conv[0].coordinates.grad, linear[0].coordinates.grad, atol=1e-6)
    assert torch.allclose(conv[0].weight, linear[0].weight.mT, atol=1e-5) and not torch.allclose(conv[0].weight, gpt()[0].weight, atol=1e-3)
    resumed = lrk.RSOAdamW(conv.parameters(), lr=1e-2, inner_steps=3)
    resumed.load_state_dict(optimizers[0].state_dict())
    lrk.to_dense(conv)
    assert [type(layer) for layer in conv] == kinds and conv[0].weight.requires_grad
    conv(torch.randn(2, 8)).sum().backward()
    assert conv[0].weight.grad.shape == (8, 12) and "_original" not in vars(conv[0])


def test_one_narrow_layer_does_not_keep_the_others_from_being_converted():
    model = nn.ModuleDict({"in_proj": nn.Linear(32, 64), "dt_proj": nn.Linear(3, 32)})
    with pytest.warns(UserWarning, match=r"rank 8 is more than the in_features of 'dt_proj' \(3\), which stay as they are") as caught:
        lrk.to_subspace(model, rank=8)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert isinstance(model["in_proj"], SubspaceLayer) and type(model["dt_proj"]) is nn.Linear and model["dt_proj"].weight.requires_grad
    optimizer = lrk.RSOAdamW(model.parameters())
    model["dt_proj"](torch.randn(2, 3)).sum().backward()
    before = model["dt_proj"].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model["dt_proj"].weight, before)


def test_groups_sorted_by_names_are_told_about_coordinates_and_not_about_the_conversion():
    model = lrk.to_subspace(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), rank=2)
    with pytest.raises(
        ValueError, match="no coordinates of a SubspaceLinear but weights of such layers.* put `coordinates` with the weights"
    ):
        lrk.RSOAdamW([parameter for name, parameter in model.named_parameters() if "weight" in name])
    with pytest.raises(ValueError, match="convert the model with to_subspace before"):
        lrk.RSOAdamW(nn.Linear(4, 4).parameters())
    optimizer = lrk.RSOAdamW(
        [{"params": [p for n, p in model.named_parameters() if ("weight" in n) == of_weights]} for of_weights in (True, False)]
    )
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()


def test_an_outer_step_that_a_scaler_skipped_is_no_lack_of_gradients():
    model = lrk.to_subspace(nn.Sequential(nn.Linear(8, 8)), rank=2)
    optimizer = lrk.RSOAdamW(model.parameters(), inner_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.randn(3, 8)).sum().backward()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
            optimizer.step()
