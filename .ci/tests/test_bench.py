""".ci/bench.py measures; what it measures is not looked at."""
import os
import re
import shutil
import sys
import unittest

from support import CACHE, HERE, Case, needs

BENCH_PEERS = [os.path.join(CACHE, "go-peer"), os.path.join(CACHE, "venv", "bin", "waitress-serve"),
               os.path.join(CACHE, "venv", "bin", "uvicorn")]


class TestBench(Case):
    """.ci/bench.py, in its shortest form: that it measures, not what it measures."""

    def bench(self, *arguments):
        """Run it; return its table as {figure: [cells]}, and all that it printed."""
        bench = self.program(sys.executable, os.path.join(HERE, ".ci", "bench.py"), *arguments)
        self.assertEqual(bench.wait(), 0, bench.log)
        rows = [line.strip("| ").split(" | ") for line in bench.lines if line.startswith("| ")]
        return {row[0]: row[1:] for row in rows}, bench.log

    @needs("wrk", shutil.which("wrk"))
    def test_load_is_counted_and_timed(self):
        table, log = self.bench("--quick", "--only", "sidecar", "pairs", "last-end")
        rates = [cells[0] for figure, cells in table.items()
                 if figure.startswith("Pairs a second: ")]
        self.assertEqual(len(rates), 5, log)
        for rate in rates:
            self.assertGreater(int(rate.replace(",", "")), 0, log)
        self.assertNotIn("failed", log)
        self.assertTrue(any(re.search("to exit", figure) for figure in table), log)

    @needs("wrk and the peers of the benchmark",
           shutil.which("wrk") and all(map(os.path.exists, BENCH_PEERS)))
    def test_every_peer_serves(self):
        table, log = self.bench("--quick", "idle")
        self.assertNotIn("Left out", log)
        self.assertEqual(len(table["figure"]), 6, log)
        self.assertEqual(table["Wake-ups in 2 s without a request"][0], "0", log)

    @needs("wrk", shutil.which("wrk"))
    def test_soak(self):
        soak = self.program(sys.executable, os.path.join(HERE, ".ci", "bench.py"), "soak",
                            "--seconds", "2")
        # So short a one may find that memory is still being taken.
        self.assertIn(soak.wait(), (0, 1), soak.log)
        self.assertRegex(soak.lines[-1], "at most [0-9.]+ MiB, [0-9]+ threads, [0-9]+ descriptors")


if __name__ == "__main__":
    unittest.main(verbosity=2)
