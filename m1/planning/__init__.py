"""What a run needs before it is started: memory per rank, operations, time, money, and the layouts that fit."""
