"""Selects synthetic code-instruction data by QAQ (arXiv 2603.12165), as a Dagster project.

The packages, from the stored tables up; each imports only from those above it in this list:

    schema         every stored table: columns, vocabularies, the sources of each column
    pipeline       the declaration of the assets: inputs, partitioning, jobs
    config         the settings file; profiles/ holds two
    storage        files, tables, cached scores, deliveries, locks
    lm             prompts, batches, language models (the only torch)
    ingest         deliveries and their rows
    screening      duplicates, contamination, withdrawals, gates
    scoring        pairs -> log-probabilities -> RMI and IFD
    validity       cuts of the signals that say which pairs are valid (not yet used by an asset)
    selection      strata, ranks, strategies, the decision about every row
    calibration    validates the scores on planted defects
    publication    versions of the dataset, training files, dataset card, hub
    freshness      which stored tables are stale
    lineage        from a version back to its deliveries
    reports        summaries, plots, audit pages; pages/ holds their templates, and that of the dataset card
    orchestration  the Dagster definitions (assets, checks, jobs, resources)
    runs           runs started from this process
    automation     sensors and the schedule
    definitions    the code location
    cli            the commands a person types
"""
