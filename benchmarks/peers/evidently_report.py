"""Evidently's own drift report of two frames, from CSV files: prints the median CPU seconds of `run` as JSON."""

import json
import statistics
import sys
import time

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset

reference, current, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
frames = [pd.read_csv(path) for path in (reference, current)]
texts = [name for name in frames[0] if frames[0][name].dtype == object]
definition = DataDefinition(categorical_columns=texts, numerical_columns=[n for n in frames[0] if n not in texts])
taken = []
for _ in range(times):
    start = time.process_time()
    sides = [Dataset.from_pandas(frame, definition) for frame in frames]
    Report([DataDriftPreset()]).run(sides[1], sides[0]).dict()
    taken.append(time.process_time() - start)
print(json.dumps(statistics.median(taken)))
