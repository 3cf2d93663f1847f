"""More architectures, checked with the functions that write docs/architectures.md."""

import shutil
from importlib.util import find_spec
from typing import Any

import onnx_ir as ir
import pytest
import torch

from benchmarks.architectures import NO_PLANS, SHAPES, SIZES, Row, add_plans, build, compare, plan_cells, write_page
from benchmarks.plans import HEADER, measured_build, row
from mlmkit.errors import UserError
from mlmkit.export.attention import STANDARD_FORMS
from mlmkit.export.onnx import write_onnx
from mlmkit.model import MaskedLM, sees_context
from mlmkit.pretrained import load_pretrained


@pytest.mark.parametrize("name", ["deberta-v2", "electra", "eurobert", "fnet", "mpnet", "perceiver", "xmod"])
def test_engine_equals_torch_at_unseen_shapes(name, architecture):
    assert {batch for batch, _, _ in SHAPES} >= {1, 17}
    assert {masked for _, _, masked in SHAPES} >= {0, 1, 300}
    row, _ = architecture(name)
    assert (row.reason, row.torch_fails_at) == ("", [])
    assert row.max_log_prob_difference is not None and row.max_log_prob_difference < 1e-5
    assert (row.rank_agreement, row.top_1_agreement) == (1, 1)
    assert row.gathers_before_head == (name != "perceiver")
    if name in ("deberta-v2", "electra", "mpnet", "perceiver"):
        assert row.max_length == (62 if name == "mpnet" else 64)
        assert row.runs_at_max_length and row.fails_beyond
    assert {"LogSoftmax", "TopK"} <= set(row.operators)
    assert not {"DFT", "NonZero"} & set(row.operators), "FNet and X-MOD are exported with standard operators"


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="TensorRT for RTX is not installed")
def test_plans_are_built_in_each_precision_and_what_is_fused_is_counted(architecture, tmp_path):
    checked, folder = architecture("electra")
    shutil.copy(folder / "model.onnx", tmp_path)
    add_plans(checked, tmp_path)
    assert checked.plans == {"fp32": 0, "fp16": 2, "bf16": 2, "int8": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    refused = Row("tapas", max_length=64)  # refused by its name, whatever the graph
    add_plans(refused, tmp_path)
    assert plan_cells(refused) == ["no"] * 4
    assert all("ScatterElements" in str(reason) for reason in refused.plans.values())

    figures = measured_build(tmp_path, "electra", "fp32", 64)
    assert figures["profiles"] == list(figures["fused_attention"]) == list(figures["scratch_mib"])
    assert figures["layers"] >= 40
    assert all(figures[name] > 0 for name in ("seconds", "peak_mib", "plan_mib"))
    assert len(["electra", "fp32", *row(figures)]) == len(HEADER)


def test_the_page_says_what_builds_what_is_fused_and_why_the_rest_is_not_built(tmp_path):
    agrees: dict[str, Any] = {"max_log_prob_difference": 1e-6, "rank_agreement": 1.0, "top_1_agreement": 1.0}
    rows = [
        Row("bert", **agrees, plans={"fp32": 0, "fp16": 2, "bf16": 2, "int8": 2}),
        Row("fnet", **agrees, plans=dict.fromkeys(("fp32", "fp16", "bf16", "int8"), "no DFT")),
        Row("xlm", **agrees, plans={"fp32": 0, "fp16": "A", "bf16": 0, "int8": "A"}),
        Row("mra", reason="torch: zeros"),
    ]
    path = tmp_path / "page.md"
    path.write_text("# Page\n\n<!-- architectures.py: begin -->\nold\n<!-- architectures.py: end -->\n\nThe rest.\n")
    write_page(path, rows)
    page = path.read_text()
    for said in (
        "**3 of 4 export and agree**",
        "**6 of 12 plans build**",
        "| bert | 1.0e-06 | 1, 1 |  |  |  |  | yes | 2 fused | 2 fused | 2 fused | yes |",
        "| no | no | no | no | yes |",
        "| yes | no | yes | no | torch only |",
        "- **fnet** has no plan: `no DFT`",
        "- **xlm** has no plan in fp16, int8: `A`",
        "- **mra** is not exported: `torch: zeros`",
    ):
        assert said in page, said
    assert "old" not in page and page.startswith("# Page\n") and page.endswith("\nThe rest.\n")
    assert NO_PLANS not in page
    write_page(path, [Row("bert", **agrees), Row("mra", reason="torch: zeros")])
    page = path.read_text()
    assert NO_PLANS in page and "fused" not in page


@pytest.fixture
def one_layer(monkeypatch) -> None:
    """Models of one layer, as exporting takes seconds for each."""
    for name in ("num_hidden_layers", "n_layers"):
        monkeypatch.setitem(SIZES, name, 1)


def test_what_torch_cannot_export_is_refused_in_one_line(one_layer, tmp_path):
    with pytest.raises(UserError, match=r"torch cannot export a longformer model: \w") as raised:
        write_onnx(MaskedLM(build("longformer")), tmp_path / "model.onnx")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_length_that_the_exporter_fixed_is_found_out(one_layer, tmp_path):
    model = MaskedLM(build("distilbert"))

    def count_by_hand(_module, _positional, named):
        assert sum(1 for _ in range(named["input_ids"].shape[1]))

    model.network.register_forward_pre_hook(count_by_hand, with_kwargs=True)
    with pytest.raises(UserError, match="for one shape only: it fixed input_ids"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_form_that_gives_other_logits_is_not_used(one_layer, monkeypatch, tmp_path):
    monkeypatch.setitem(STANDARD_FORMS, "FNetBasicFourierTransform", ("forward", lambda module, config, x: (x,)))
    write_onnx(model := MaskedLM(build("fnet")), tmp_path / "model.onnx")
    assert "DFT" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}
    assert not [module for module in model.network.modules() if "forward" in vars(module)]


def test_the_comparison_finds_another_model(architecture):
    graph = architecture("electra")[1] / "model.onnx"
    compare(model := MaskedLM(build("electra")), graph, 64, Row("electra"))
    head: Any = model.network.get_output_embeddings()
    with torch.no_grad():
        head.bias[150] += 0.1
    with pytest.raises(ValueError, match="other numbers"):
        compare(model, graph, 64, Row("electra"))


def test_a_vocabulary_inside_a_larger_configuration():
    model = MaskedLM(build("ultravbert"))
    assert not hasattr(model.network.config, "vocab_size")
    assert (model.vocabulary_size, model.max_length()) == (200, 64)
    assert sees_context(model)


def test_a_model_that_does_not_look_at_the_context_is_refused(tokenizer_folder, tmp_path):
    """Without its CUDA kernel, transformers replaces MRA's attention by zeros."""
    network = build("mra")
    network.resize_token_embeddings(600)
    network.save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder("wordpiece"), tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="do not depend on the other tokens"):
        load_pretrained(str(tmp_path))
