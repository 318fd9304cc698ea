"""The attack suite: attacks as data, and one function that runs them against an engine (`m1 sandbox attack`).

jobs: programs against the host, the limits and the runner. texts: answers against what reads them. forgeries and
written: answers that are wrong and want to be paid. single_run: attacks on one run of tests alone.
"""
