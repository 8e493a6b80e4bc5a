"""Training end to end against a plain DataLoader loop: the same network, batch size, rows and epochs in one run.

Ours keeps the table on the device, shuffles there, has constant shapes, a cheap dropout mask and a fused optimiser;
the peer is what a PyTorch tutorial shows: TensorDataset, DataLoader, nn.Dropout, AdamW, `loss.item()` after every
step. On a CPU both have one thread. Where there is a CUDA device, both run there too.
"""

import needs

needs.packages()

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from report import arguments, at_least, finish
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlnb.models.tabular import Encoder
from mlnb.models.training import TabularNetwork, Trainer, TrainingConfig, to_device

FEATURES = Path(__file__).parents[1] / "products" / "flights" / "features.parquet"
ROUNDS = 5
BAR = 2.0


def rows() -> tuple[str, dict, np.ndarray, tuple, tuple]:
    """January to May of the reference project, or made-up rows of the same shape where its pipeline has not run."""
    from mlnb.flights.features import CATEGORICAL, NUMERIC

    if FEATURES.exists():
        import pandas as pd

        from mlnb.flights.train import between, inputs

        train = between(pd.read_parquet(FEATURES), "2013-01-01", "2013-06-01")
        return "flights", inputs(train), train["disrupted"].to_numpy(), CATEGORICAL, NUMERIC
    random, n = np.random.default_rng(0), 137_915
    sizes = {"carrier": 16, "origin": 3, "dest": 103, "day_of_week": 7, "hour": 19}
    made = {name: random.integers(0, size, n).astype(str) for name, size in sizes.items()}
    made |= {name: random.normal(size=n) for name in NUMERIC}
    return "made-up rows", made, random.integers(0, 2, n), CATEGORICAL, NUMERIC


def ours(
    encoder: Encoder, columns: dict, labels: np.ndarray, config: TrainingConfig, device: torch.device, epochs: int
) -> float:
    """Rows a second from columns in memory to a trained network."""
    started = time.perf_counter()
    table = to_device(encoder, columns, labels, device)
    trainer = Trainer(
        encoder, table, to_device(encoder, {k: v[:1] for k, v in columns.items()}, labels[:1], device), config
    )
    for _ in range(epochs):
        trainer.run_epoch()
    return epochs * trainer.steps * trainer.batch / (time.perf_counter() - started)


def peer(
    encoder: Encoder, columns: dict, labels: np.ndarray, config: TrainingConfig, device: torch.device, epochs: int
) -> float:
    """Rows a second of the plain loop, from the same columns."""
    started = time.perf_counter()
    codes, numbers = encoder.encode(columns)
    data = TensorDataset(
        torch.from_numpy(codes), torch.from_numpy(numbers).float(), torch.tensor(labels, dtype=torch.float32)
    )
    loader = DataLoader(data, batch_size=config.batch, shuffle=True, drop_last=True, pin_memory=device.type == "cuda")
    torch.manual_seed(config.seed)
    network, loss_function = TabularNetwork(encoder, config), nn.BCEWithLogitsLoss()
    for layer in network.layers:
        layer.dropout = nn.Dropout(config.dropout)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    done, total = 0, 0.0
    for _ in range(epochs):
        for batch in loader:
            c, x, y = (t.to(device) for t in batch)
            loss = loss_function(network(c, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, done = total + loss.item(), done + len(y)
    return done / (time.perf_counter() - started)


def measure(device: torch.device, epochs: int) -> dict:
    """One row of the table: medians over rounds in which both take turns."""
    source, columns, labels, categorical, numeric = rows()
    config = TrainingConfig(device=device.type, epochs=epochs)
    encoder = Encoder.fit(columns, categorical, numeric)
    both = lambda n: [run(encoder, columns, labels, config, device, n) for run in (ours, peer)]
    both(1)
    rounds = [both(epochs) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    name = f"training, samples/s, {where}, {source}, batch {config.batch}"
    return at_least(name, mine, theirs, BAR)


def main():
    chosen = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    results = [measure(torch.device("cpu"), epochs=2)]
    if torch.cuda.is_available():
        results.append(measure(torch.device("cuda"), epochs=10))
    finish(results, chosen.json)


if __name__ == "__main__":
    main()
