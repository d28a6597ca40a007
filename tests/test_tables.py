"""README and docs show what benchmarks/results holds, and nothing else."""

from benchmarks.tables import main


def test_no_rendered_table_is_stale():
    assert main(check=True) == 0
