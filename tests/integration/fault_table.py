"""The table of docs/operations.md, from what test_fault_matrix.py recorded: python -m tests.integration.fault_table."""

from __future__ import annotations

import json
import sys

from tests.integration.fault_stage import RECORD


def main() -> None:
    """Print it."""
    rows = json.loads(RECORD.read_text()).values()
    lines = ["| fault | what clients saw | back after | requests lost | afterwards |", "|---|---|---|---|---|"]
    for row in rows:
        back = "–" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
        lost = "–" if row["lost"] is None else str(row["lost"])
        lines.append(f"| {row['fault']} | {row['client_saw']} | {back} | {lost} | {row['rest']} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
