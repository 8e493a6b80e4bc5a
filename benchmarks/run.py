"""Run every benchmark in this folder and write README.md from what was measured.

Each program times mlnb and a peer in one run and prints, with `--json`, a list of {"name", "ours", "peer", "ratio",
"bar", "holds"}; where there is no peer, peer and ratio are null and the bar is a text. It ends with 1 where a bar
does not hold, and with 2 where it cannot run. So does this one, and then it leaves README.md as it is.
"""

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import needs
from report import arguments, formatted

BENCHMARK_FOLDER = Path(__file__).parent
TEXT = """# Benchmarks

Each program times mlnb and a peer in one run and prints the ratio of their medians; a bar is what must hold: the least
ratio, or the figure that is written there.
Absolute figures belong to the machine, ratios travel better. `make bench` runs all of them and writes this page.

Measured on {date}: {machine}.

| work | ours | peer | ratio | bar | holds |
| --- | --- | --- | --- | --- | --- |
{rows}
"""
WRITTEN = "## Beside the table"  # from here on the page is written by hand, and stays


def machine() -> str:
    """The processor, cores, versions and, where there is one, the CUDA device."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{processor}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def measure(program: Path) -> tuple[str, list[dict]]:
    """Headline and rows of one benchmark; one that cannot run, or measures nothing, ends the whole run with 2."""
    done = subprocess.run(
        [sys.executable, str(program), "--json"], stdout=subprocess.PIPE, text=True, cwd=BENCHMARK_FOLDER.parent
    )
    try:
        rows = json.loads(done.stdout)
    except json.JSONDecodeError:
        rows = []
    if done.returncode not in (0, 1) or not rows:
        needs.cannot_run(f"{program.name} ended with {done.returncode} and {len(rows)} rows", "run it alone to see why")
    return program.stem, rows


def table(measured: list[tuple[str, list[dict]]]) -> str:
    """Markdown rows, one a measurement."""

    def line(program: str, r: dict) -> str:
        figures = " | ".join(
            [
                formatted(r["ours"]),
                formatted(r["peer"]),
                f"{formatted(r['ratio'])}x" if r["ratio"] else "",
                formatted(r["bar"]),
            ]
        )
        return f"| {program}: {r['name']} | {figures} | {'yes' if r['holds'] else '**no**'} |"

    return "\n".join(line(program, row) for program, rows in measured for row in rows)


def main():
    parser = arguments(__doc__)
    options = parser.parse_args()
    needs.everything()
    programs = sorted(
        p
        for p in BENCHMARK_FOLDER.glob("*.py")
        if p.name not in {"run.py", "generated.py", "needs.py", "report.py", "servers.py"}
    )
    measured = []
    for program in programs:
        print(f"{program.stem} ...", file=sys.stderr)
        measured.append(measure(program))
    page = TEXT.format(date=dt.date.today().isoformat(), machine=machine(), rows=table(measured))
    file = BENCHMARK_FOLDER / "README.md"
    written = "".join(file.read_text().partition(f"\n{WRITTEN}")[1:]) if file.exists() else ""
    file.write_text(page + written)
    rows = [row for _, rows in measured for row in rows]
    print(json.dumps(rows) if options.json else page)
    sys.exit(0 if all(r["holds"] for r in rows) else 1)


if __name__ == "__main__":
    main()
