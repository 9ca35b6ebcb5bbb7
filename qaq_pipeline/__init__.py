"""Selects synthetic code-instruction data by QAQ (arXiv 2603.12165), as a Dagster project.

The map, each module importing only from those above it:

    schema            every stored table: columns, dtypes, units, keys, what null means
    config            the settings file, as closed pydantic models; profiles/ holds two
    identity          what makes a score what it is: the key of the cache
    records           delivered files -> one row per record: accepted, or rejected with a reason
    gates             whether a batch is fit to be scored and published
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
    selection         the strategies and their exact budgets
    ledger            every input row: decision, reason, sentence
    exports           selected rows -> messages JSONL, Alpaca JSON, scores Parquet
    model_files       where a model comes from: hub, directory, GGUF converted once
    workers           the processes that score batches, one for each core or GPU; leases of GPUs
    runner            a batch through the model: packed, padded, or by its own logits; the self-test (torch)
    storage           tables, deliveries and cached scores: atomic, with provenance; what is torn is set aside
    causal_lm         the model on its device: tokenizer, dtype, memory, how many load it (torch, transformers)
    planner           pairs -> the sequences that the cache does not have, a window ahead of the model
    shards            finished scores on their way into the cache, stored every few seconds
    scoring           pairs -> Logprobs: one scoring from the cache to its table
    publication       batches -> a version of the dataset, its manifest
    resources         the above as Dagster resources
    assets/           the nine assets, one module each
    definitions       assets, jobs, resources and executor put together
    liveness          which runs of the driver died with their process
    driver            runs the jobs for a batch; what `qaq run` does
    doctor            what stands in the way of a run on this machine
    cli               the commands a person types
"""
