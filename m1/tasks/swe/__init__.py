"""Software-engineering tasks made from real packages and repositories, validated in the sandbox."""
