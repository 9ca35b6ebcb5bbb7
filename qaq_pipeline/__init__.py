"""Selects synthetic code-instruction data by QAQ (arXiv 2603.12165), as a Dagster project.

The map, each module importing only from those above it:

    schema            every stored table: columns, dtypes, units, keys, what null means
    column_lineage    of every column, those that it is derived from
    config            the settings file, as closed pydantic models; profiles/ holds two
    identity          what makes a score what it is: the key of the cache
    summaries         rows -> the counts, shares, bins and examples that a person reads
    plots             these as charts: SVG for a page, PNG for the UI (altair, vl-convert)
    records           delivered files -> one row per record: accepted, or rejected with a reason
    gates             whether a batch is fit to be scored and published
    alerts            what is said when something goes wrong, and the channels that carry it
    shingles          texts as sequences of hashed words, and sets of hashed n-grams
    duplicates        equal and near rows, in the batch and in older ones; their signatures
    benchmarks        the files of HumanEval, MBPP and LiveCodeBench
    contamination     benchmark tasks in rows, with the evidence
    screening         which rows are scored: neither rejected, nor contaminated, nor duplicates
    prompts           a pair -> token sequences of the wanted quantities: templates, priors, truncation
    batching          sequences -> batches: longest first, by token budget
    head              hidden states -> log-probabilities of target tokens: the token shift, the output head (torch)
    attention         attention over packed sequences and their shared prefixes (torch, transformers)
    scores            sums and counts -> log PPL, RMI, IFD
    strata            strata of PPL(Q), the rank of RMI inside them, the gap between the models
    measures          what the asset checks measure of stored tables
    selection         the strategies and their exact budgets
    defects           a good pair made bad: other answer, echo, refusal, one-token bug, …
    planting          which rows of a batch are made bad, and how
    reference         a frozen pool of several batches: ranks and cuts against it, drift from it
    lookup            rows of a Parquet file by their key; what a person means by a row
    calibration       do the scores tell good from bad? AUROCs, kept shares, cuts, with their intervals
    calibration_page  what a person reads of it: tables, Markdown, the page with plots
    ledger            every input row: decision, reason, sentence
    exports           selected rows -> the files that trainers load; scores Parquet
    card              what lies in a version and how it was chosen: its README
    model_files       where a model comes from: hub, directory, GGUF converted once
    workers           the processes that score batches, one for each core or GPU; leases of GPUs
    runner            a batch through the model: packed, padded, or by its own logits; the self-test (torch)
    storage           tables, deliveries and cached scores: atomic, with provenance; what is torn is set aside
    causal_lm         the model on its device: tokenizer, dtype, memory, how many load it (torch, transformers)
    planner           pairs -> the sequences that the cache does not have, a window ahead of the model
    shards            finished scores on their way into the cache, stored every few seconds
    scoring           pairs -> Logprobs: one scoring from the cache to its table
    withdrawals       what must not be published any more, and why
    landing           deliveries in the landing zone: complete or not, refused or copied
    publication       batches -> a version of the dataset, its manifest
    report            what stands on the audit page of a batch, and of a version; pages/ holds the templates
    page_files        the audit pages in the storage, and whether they are of what stands now
    audit             a row's fate now and in every version, and what made it: reading only
    hub               a version where others load it: the Hugging Face hub, a folder, a URL; what `qaq publish` does
    lineage           from a version back to what was delivered, and whether all of it is what it was
    recuration        what is out of date, by the provenance of what is stored
    resources         the above as Dagster resources
    failures          why a run failed, in its own words
    assets/           the nine assets, rank_reference, two audit pages and the three of a calibration, one module each
    liveness          which runs died with their process
    checks            the asset checks: what a person should look at; they warn, and stop nothing
    conditions        when an asset is made without a hand
    jobs              assets, checks, jobs, resources and executor put together
    runs              one run of a job in this process, and what is told of it
    renewal           brings batches up to date, and publishes; what `qaq recurate` and `qaq withdraw` do
    driver            a new batch's way through the jobs; what `qaq run` does
    automation        sensors, the nightly job and its schedule
    alerting          the sensor that sends an alert for every failed run
    definitions       jobs and automation put together: the code location
    dossier           all about a row, as `qaq explain` shows it
    doctor            what stands in the way of a run on this machine
    lineage_tree      lineage as trees for the terminal
    cli               the commands a person types
"""
