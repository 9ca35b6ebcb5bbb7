"""Runs in an environment of LLaMA-Factory: what its own loader and processor make of entries of a dataset_info.json.

    python llama_factory_probe.py FOLDER TOKENIZER ENTRY…

Prints for each entry a line of JSON: the text of every example, and the part of it that the loss is on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp()}
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    folder, model, *entries = sys.argv[1:]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    training = Seq2SeqTrainingArguments(output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True)
    for entry in entries:
        data = DataArguments(dataset_dir=folder, dataset=entry, template="default", cutoff_len=1_000_000)
        template = get_template_and_fix_tokenizer(tokenizer, data)
        found = get_dataset(template, ModelArguments(model), data, training, stage="sft", tokenizer=tokenizer)
        examples = [
            {
                "text": tokenizer.decode(row["input_ids"]),
                "target": tokenizer.decode([label for label in row["labels"] if label >= 0]),
            }
            for row in found["train_dataset"]
        ]
        print("examples:", json.dumps({"entry": entry, "examples": examples}))


if __name__ == "__main__":
    main()
