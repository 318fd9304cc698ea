"""Order: which stage after which, deployments, caching, lineage and the report."""
