"""Environment of processes that train."""

#: The allocator keeps freed memory. Given back and fetched again at every step, tens of megabytes a time, it costs a
#: tenth of a step in page faults.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
