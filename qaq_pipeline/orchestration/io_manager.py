"""The IO manager: Dagster reads and writes stored tables through the storage."""

import dagster as dg

from qaq_pipeline.config.settings import RuntimeSettings
from qaq_pipeline.orchestration.failures import guarding
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable


class TableIOManager(dg.IOManager):
    """Stored tables as Dagster values: one `StoredTable` per partition, written atomically under its lock.

    An asset of a batch that reads an asset of batch and model gets a dict of tables by model, keys sorted.
    """

    def __init__(self, storage: Storage, runtime: RuntimeSettings) -> None:
        self._storage = storage
        self._runtime = runtime

    def handle_output(self, context: dg.OutputContext, obj: StoredTable) -> None:
        name, partition = context.asset_key.path[-1], Partition.parse(context.partition_key)
        with guarding(self._runtime), self._storage.locks.hold(name, *partition.parts):
            self._storage.tables.write(obj, name, partition)

    def load_input(self, context: dg.InputContext) -> StoredTable | dict[str, StoredTable]:
        name = context.asset_key.path[-1]
        partitions = [Partition.parse(key) for key in sorted(context.asset_partition_keys)]
        with guarding(self._runtime):
            tables = {partition.model: self._storage.tables.read(name, partition) for partition in partitions}
        by_model = {model: table for model, table in tables.items() if model is not None}
        if by_model and not isinstance(context.partition_key, dg.MultiPartitionKey):
            return by_model
        (table,) = tables.values()
        return table
