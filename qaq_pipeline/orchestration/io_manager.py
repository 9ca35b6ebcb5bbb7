"""How Dagster reads and writes a table: by the storage, with its provenance."""

import dagster as dg

from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable


def partition_parts(partition_key: str) -> tuple[str, ...]:
    """(batch,) of a batch partition, (batch, model) of a batch-by-model partition.

    Raises:
        ValueError: the name of the batch cannot be used.
    """
    batch, *model = partition_key.split("|")
    return (check_batch_name(batch), *model)


class TableIOManager(dg.IOManager):
    """Stored tables as Dagster values: one `StoredTable` a partition, written atomically under its lock.

    An asset of one batch that reads an asset of batch-by-model gets a dict of tables by model, keys sorted.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def handle_output(self, context: dg.OutputContext, obj: StoredTable) -> None:
        name, parts = context.asset_key.path[-1], partition_parts(context.partition_key)
        with self._storage.locks.hold(name, *parts):
            self._storage.tables.write(obj, name, Partition(*parts))

    def load_input(self, context: dg.InputContext) -> StoredTable | dict[str, StoredTable]:
        name = context.asset_key.path[-1]
        partitions = sorted(partition_parts(key) for key in context.asset_partition_keys)
        tables = {parts: self._storage.tables.read(name, Partition(*parts)) for parts in partitions}
        has_models = any(len(parts) > 1 for parts in partitions)
        if has_models and not isinstance(context.partition_key, dg.MultiPartitionKey):
            return {parts[1]: table for parts, table in tables.items()}
        (table,) = tables.values()
        return table
