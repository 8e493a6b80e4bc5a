import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlnb.models.metrics import log_loss
from mlnb.models.tabular import Encoder
from mlnb.models.training import (
    TabularNetwork,
    Trainer,
    TrainingConfig,
    TrainingTable,
    fit,
    learning_rate,
    pick_device,
    restore_checkpoint,
    save_checkpoint,
    to_device,
    to_predictor,
)
from mlnb.project.errors import ModelError

NAMES = (("origin",), ("wind", "backlog"))
SMALL = TrainingConfig(epochs=4, batch=128, width=32, depth=2, embedding=4, device="cpu")

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def flights(n=2_000, seed=0):
    rng = np.random.default_rng(seed)
    columns = {
        "origin": rng.choice(["EWR", "JFK", "LGA"], n),
        "wind": np.where(rng.random(n) < 0.1, np.nan, rng.exponential(10, n)),
        "backlog": rng.normal(0, 3, n),
    }
    logit = np.nan_to_num(columns["wind"], nan=5) / 8 + columns["backlog"] / 2 - 1
    return columns, (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)


def train(config=SMALL, **more):
    return fit(*flights(), *flights(700, 1), *NAMES, config, **more)


def digest(predictor):
    return hashlib.sha256(b"".join(v.tobytes() for _, v in sorted(predictor.weights.items()))).hexdigest()


def small_trainer(config=SMALL, device="cpu"):
    columns, labels = flights()
    encoder, device = Encoder.fit(columns, *NAMES), torch.device(device)
    return encoder, Trainer(
        encoder, to_device(encoder, columns, labels, device), to_device(encoder, columns, labels, device), config
    )


@pytest.mark.parametrize("change", [{}, {"bf16": True}, {"batch": 10_000}, {"depth": 1}])
def test_a_seed_repeats_bit_for_bit_and_another_differs(change):
    config = replace(SMALL, **change)
    assert (
        digest(train(config).predictor)
        == digest(train(config).predictor)
        != digest(train(replace(config, seed=1)).predictor)
    )


def test_it_learns_more_than_the_base_rate():
    columns, labels = flights(700, 1)
    trained = train(replace(SMALL, epochs=10))
    assert log_loss(labels, trained.predictor.predict(columns)) == pytest.approx(trained.best.valid_loss, abs=1e-5)
    assert trained.best.valid_loss < log_loss(labels, np.full(700, labels.mean())) - 0.1


def test_numpy_gives_what_the_network_gives():
    columns, _ = flights()
    encoder, trainer = small_trainer()
    trainer.run_epoch()
    trainer.network.eval()
    with torch.inference_mode():
        by_torch = torch.sigmoid(trainer.network(trainer.train.codes, trainer.train.numbers)).numpy()
    ours = to_predictor(encoder, trainer.network.state_dict()).predict(columns)
    assert np.abs(ours - by_torch).max() < 1e-6


def test_the_callers_random_state_and_switches_are_left_alone():
    torch.manual_seed(7)
    expected, before = torch.rand(3), (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    torch.manual_seed(7)
    train(replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(3), expected)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_it_stops_when_validation_no_longer_improves():
    rng = np.random.default_rng(0)
    columns, _ = flights()
    noise = rng.integers(0, 2, 2_000)
    config = replace(SMALL, epochs=60, patience=2, learning_rate=0.02)
    trained = fit(columns, noise, columns, 1 - noise, *NAMES, config)
    assert len(trained.history) == trained.best.epoch + 2 < 60


def test_callbacks_see_every_epoch_and_step():
    epochs, steps = [], []
    trained = train(on_epoch=epochs.append, progress=lambda done, total: steps.append((done, total)))
    assert epochs == trained.history and [e.epoch for e in epochs] == [1, 2, 3, 4]
    assert steps == [(i, 60) for i in range(1, 61)]  # 2000 rows are 15 whole batches of 128


def test_the_unknown_category_stays_zero():
    encoder, trainer = small_trainer()
    trainer.run_epoch()
    assert torch.equal(trainer.network.embedding.weight[encoder.unknown], torch.zeros(1, 4))


def test_the_rate_warms_up_and_falls():
    rates = [learning_rate(i, 100, TrainingConfig(warmup=0.1)) for i in range(100)]
    assert rates.index(max(rates)) in (9, 10) and rates[0] == pytest.approx(2e-4) and rates[-1] < 1e-5
    assert rates[10:] == sorted(rates[10:], reverse=True)


# A kill

_CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_training import NAMES, SMALL, flights
from mlnb.models.training import fit

def hang(done, total):
    if done == int(sys.argv[1]):
        print("stopped", flush=True)
        time.sleep(600)

trained = fit(*flights(), *flights(700, 1), *NAMES, SMALL, checkpoint={path!r}, progress=hang)
trained.predictor.save({folder!r})
"""


def _run_child(tmp_path, stop_at_step):
    code = _CHILD.format(
        tests=os.path.dirname(__file__), path=str(tmp_path / "last.safetensors"), folder=str(tmp_path / "model")
    )
    return subprocess.Popen([sys.executable, "-c", code, str(stop_at_step)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("step", [5, 37])  # in the first epoch, before any checkpoint; in the third
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, step):
    first = _run_child(tmp_path, step)
    assert first.stdout.readline() == "stopped\n"
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (tmp_path / "last.safetensors").exists() == (step > 15)
    assert not (tmp_path / "model").exists()

    second = _run_child(tmp_path, -1)
    messages, _ = second.communicate()
    assert second.returncode == 0 and ("resumes after epoch 2" in messages) == (step > 15)
    train().predictor.save(tmp_path / "undisturbed")
    for name in ("predictor.json", "weights.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not (tmp_path / "last.safetensors").exists()


class Kill(Exception):
    pass


def _interrupted(path, config=SMALL, after=2):
    def stop(epoch):
        if epoch.epoch == after:
            raise Kill

    with pytest.raises(Kill):
        train(config, checkpoint=path, on_epoch=stop)


@pytest.mark.parametrize("change", [{"bf16": True}, {"dropout": 0.0}, {"seed": 5}])
def test_going_on_is_exact_under_other_settings(tmp_path, change):
    config = replace(SMALL, **change)
    _interrupted(tmp_path / "last", config)
    epochs = []
    again = train(config, checkpoint=tmp_path / "last", on_epoch=epochs.append, log=lambda _: None)
    assert digest(again.predictor) == digest(train(config).predictor)
    assert [e.epoch for e in epochs] == [1, 2, 3, 4]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler to compile graphs with")
@pytest.mark.long
def test_going_on_is_exact_with_compiled_graphs(tmp_path):
    config = replace(SMALL, compiled=True, bf16=True)
    _interrupted(tmp_path / "last", config)
    again = train(config, checkpoint=tmp_path / "last", log=lambda _: None)
    assert digest(again.predictor) == digest(train(config).predictor)
    assert again.best.valid_loss == pytest.approx(train().best.valid_loss, abs=0.01)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 5}, {"width": 16}, {"learning_rate": 1e-3}, {"bf16": True}])
def test_a_checkpoint_of_other_settings_is_not_used(tmp_path, change):
    _interrupted(tmp_path / "last", replace(SMALL, **change))
    messages = []
    again = train(checkpoint=tmp_path / "last", log=messages.append)
    assert "of other settings or other data: training starts over" in messages[0]
    assert digest(again.predictor) == digest(train().predictor)


@pytest.mark.parametrize("which", ["row", "label", "validation"])
def test_a_checkpoint_of_other_data_is_not_used(tmp_path, which):
    _interrupted(tmp_path / "last")
    (columns, labels), valid = flights(), flights(700, 1)
    if which == "row":
        columns["backlog"][17] += 0.5
    elif which == "label":
        labels[17] = 1 - labels[17]
    else:
        valid[1][3] = 1 - valid[1][3]
    messages = []
    fit(columns, labels, *valid, *NAMES, SMALL, checkpoint=tmp_path / "last", log=messages.append)
    assert "of other settings or other data: training starts over" in messages[0]


@pytest.mark.parametrize("content", [b"", b"torn", None])
def test_a_torn_checkpoint_starts_anew_and_says_so(tmp_path, content):
    _interrupted(tmp_path / "last")
    whole = (tmp_path / "last").read_bytes()
    (tmp_path / "last").write_bytes(whole[: len(whole) // 2] if content is None else content)
    messages = []
    again = train(checkpoint=tmp_path / "last", log=messages.append)
    assert "cannot be read" in messages[0] and "training starts over" in messages[0]
    assert digest(again.predictor) == digest(train().predictor)


def test_a_finished_training_leaves_no_checkpoint(tmp_path):
    train(checkpoint=tmp_path / "deep" / "last", log=pytest.fail)
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_checkpoint_restores_every_tensor(tmp_path):
    from mlnb.models.training import _state

    _, trainer = small_trainer()
    trainer.run_epoch()
    save_checkpoint(tmp_path / "last", trainer, "same")
    _, other = small_trainer()
    assert restore_checkpoint(tmp_path / "last", other, "same") == ""
    ours, theirs = _state(trainer), _state(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours if k != "random.host")
    assert other.history == trainer.history


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "tpu9"}, "device has value 'tpu9'; write device: auto, cpu or cuda"),
        ({"device": "cude"}, "did you mean 'cuda'"),
        ({"epochs": 0}, "epochs has value 0; write a whole number of at least 1"),
        ({"epochs": 2.5}, "epochs has value 2.5"),
        ({"epochs": True}, "epochs has value True"),
        ({"batch": "64"}, "batch has value '64'"),
        ({"dropout": 1.0}, "dropout has value 1.0; write a number from 0 to below 1"),
        ({"learning_rate": float("nan")}, "learning_rate has value nan"),
        ({"seed": -1}, "seed has value -1; write a whole number of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_written(change, words):
    with pytest.raises(ModelError, match=words):
        TrainingConfig(**change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_gpu_is_said():
    with pytest.raises(ModelError, match="PyTorch finds no CUDA GPU; write device: auto or cpu"):
        train(replace(SMALL, device="cuda"))
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.r_[np.nan, np.zeros(1_999)], "1 of 2000 training labels are neither 0 nor 1"),
        (np.full(2_000, 2), "2000 of 2000 training labels"),
        (np.zeros(1_999), "training labels have shape"),
        (np.ones(2_000), "all 2000 training labels are 1; there is nothing to learn"),
    ],
)
def test_training_labels_that_cannot_be_used_are_named(labels, words):
    with pytest.raises(ModelError, match=words):
        fit(flights()[0], labels, *flights(700, 1), *NAMES, SMALL)


def test_empty_or_incomplete_rows_are_named():
    columns, labels = flights()
    none = {k: v[:0] for k, v in columns.items()}
    with pytest.raises(ModelError, match="there are no training rows"):
        fit(none, labels[:0], columns, labels, *NAMES, SMALL)
    with pytest.raises(ModelError, match="there are no validation rows"):
        fit(columns, labels, none, labels[:0], *NAMES, SMALL)
    with pytest.raises(ModelError, match=r"column 'wnd' is not in the data \(did you mean 'wind'\?\)"):
        fit(columns, labels, columns, labels, ("origin",), ("wnd",), SMALL)


def test_a_loss_that_explodes_is_said():
    with pytest.raises(ModelError, match="lower learning_rate"):
        train(replace(SMALL, learning_rate=1e30, warmup=0.0, weight_decay=1e30))


# Where a GPU is


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("change", [{}, {"bf16": True}, {"compiled": True}, {"bf16": True, "compiled": True}])
def test_on_cuda_a_seed_repeats_and_a_kill_is_exact(tmp_path, change):
    config = replace(SMALL, device="cuda", **change)
    _interrupted(tmp_path / "last", config)
    again = train(config, checkpoint=tmp_path / "last", log=lambda _: None)
    assert digest(again.predictor) == digest(train(config).predictor)


@pytest.mark.cuda
@cuda
def test_on_cuda_the_loss_is_that_of_the_processor():
    on_gpu, on_cpu = train(replace(SMALL, device="cuda", dropout=0.0)), train(replace(SMALL, dropout=0.0))
    assert on_gpu.best.valid_loss == pytest.approx(on_cpu.best.valid_loss, abs=0.02)


@pytest.mark.cuda
@cuda
def test_on_cuda_an_epoch_waits_once_for_the_device():
    _, trainer = small_trainer(replace(SMALL, device="cuda"), "cuda")
    trainer.run_epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_pass(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@cuda
def test_on_cuda_every_table_is_resident():
    _, trainer = small_trainer(replace(SMALL, device="cuda"), "cuda")
    assert all(t.is_cuda for table in (trainer.train, trainer.valid) for t in TrainingTable(*table))
    assert all(p.is_cuda for p in TabularNetwork(small_trainer()[0]).to("cuda").parameters())
