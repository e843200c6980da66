"""`expertflow record`: the trace says what transformers' routers do."""

import numpy as np
import pytest
import torch
from streamed import EVERYTHING_CACHED, use
from tiny_models import FAMILIES, make_model

from expertflow import cli
from expertflow.demo import DEMO_MODEL
from expertflow.record import record
from expertflow.traces import load_trace

TEXT = "KING HENRY:\nOnce more unto the breach, dear friends, once more.\n" * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_is_what_transformers_routers_do(tiny_streamed, family):
    streamed = use(tiny_streamed(family), EVERYTHING_CACHED)
    token_ids = torch.arange(600) * 7 % 96  # more than a window of 512
    trace = record(streamed, token_ids)
    assert trace.sequence_offsets.tolist() == [0, 512, 600]
    assert trace.num_experts == 8

    model = make_model(family)
    routed = []
    for name, module in model.named_modules():
        if name.endswith((".mlp.gate", ".mlp.router")) and hasattr(module, "top_k"):
            module.register_forward_hook(lambda *call: routed.append(call[-1][1:]))
    with torch.no_grad():
        model(token_ids[None, :512])
    assert len(routed) == trace.expert_ids.shape[1]
    for layer, (weights, ids) in enumerate(routed):
        weights, order = weights.float().sort(dim=-1, descending=True)
        assert np.array_equal(trace.expert_ids[:512, layer], ids.gather(-1, order).numpy())
        np.testing.assert_allclose(trace.weights[:512, layer], weights.numpy(), rtol=2e-3)


def test_predictions_name_the_layer_they_are_for(tiny_streamed):
    streamed = use(tiny_streamed("mixtral"), EVERYTHING_CACHED)
    trace = record(streamed, torch.arange(100) % 5 + 2, predictions=True)
    ids, need = trace.predicted_ids, trace.predicted_need
    tokens, layers, top_k = trace.expert_ids.shape
    first_ids, first_need = trace.first_predicted_ids, trace.first_predicted_need
    assert first_ids.shape == first_need.shape == (tokens, 8, 2 * top_k)
    assert not first_need[:, layers:].any()
    for layer in range(layers):
        assert (first_need[:, layer, :-1] >= first_need[:, layer, 1:]).all()
        found = first_ids[80:, layer, :top_k, None] == trace.expert_ids[80:, layer, None]
        assert found.any(-1).mean() > 0.8
    assert ids.shape == need.shape == (tokens, layers, 8, 2 * top_k)
    assert need.dtype == np.float16
    for layer in range(layers):
        for distance in range(1, 9):
            here = need[:, layer, distance - 1]
            if layer + distance >= layers:
                assert not here.any()
                continue
            assert (here[:, :-1] >= here[:, 1:]).all() and (here > 0).all()
            # Five tokens that come again and again: by the end it knows them.
            routed = trace.expert_ids[80:, layer + distance]
            found = ids[80:, layer, distance - 1, :top_k, None] == routed[:, None]
            assert found.any(-1).mean() > 0.8


def run(tmp_path, *options):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "trace.npz"
    command = ["record", str(DEMO_MODEL), "--text", str(text), "--out", str(out), *options]
    return cli.main(command), out


def test_command_writes_a_trace(tmp_path, capsys):
    status, out = run(tmp_path, "--tokens", "40", "--predictions")
    assert status == 0
    assert "40 tokens, 8 layers, top-2" in capsys.readouterr().err
    with np.load(out, allow_pickle=False) as trace:
        assert set(trace) == {
            "expert_ids",
            "weights",
            "sequence_offsets",
            "num_experts",
            "predicted_ids",
            "predicted_need",
            "first_predicted_ids",
            "first_predicted_need",
        }
        assert trace["expert_ids"].shape == (40, 8, 2)
        assert trace["expert_ids"].dtype == np.uint8
    assert load_trace(out).predicted_ids.shape == (40, 8, 8, 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.txt", "trace.npz"]


def test_command_names_what_is_wrong(tmp_path, capsys):
    out = str(tmp_path / "t.npz")
    missing = str(tmp_path / "missing.txt")
    assert cli.main(["record", str(DEMO_MODEL), "--text", missing, "--out", out]) == 1
    assert "missing.txt" in capsys.readouterr().err
    (tmp_path / "empty").write_text("")
    empty = str(tmp_path / "empty")
    assert cli.main(["record", str(DEMO_MODEL), "--text", empty, "--out", out]) == 1
    assert "has no text" in capsys.readouterr().err
    nowhere = str(tmp_path / "no" / "t.npz")
    assert cli.main(["record", str(DEMO_MODEL), "--text", empty, "--out", nowhere]) == 1
    assert "no directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--tokens", "0")
