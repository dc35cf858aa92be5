"""The only code that imports Ray: cluster, Tune's searcher and scheduler, workers."""
