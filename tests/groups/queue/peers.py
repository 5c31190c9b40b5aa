"""Readers and writers for tests of the queue: in this process, or in ranks of their own."""

import contextlib

from tcomm.groups.queue.message_queue import MessageQueue


@contextlib.contextmanager
def pair(n_reader=1, chunk_bytes=4096, chunks=4, **options):
    """A writer and its local readers, all in this process."""
    with contextlib.ExitStack() as stack:
        writer = MessageQueue(n_reader, n_reader, None, chunk_bytes, chunks, **options)
        stack.callback(writer.shutdown)
        readers = []
        for rank in range(n_reader):
            readers.append(MessageQueue.create_from_handle(writer.export_handle(), rank))
            stack.callback(readers[-1].shutdown)
        writer.wait_until_ready(5)
        for reader in readers:
            reader.wait_until_ready(5)
        yield (writer, *readers)


def from_rank_0(member, n_reader=None, chunk_bytes=4096, chunks=4, **options):
    """The queue of a world, by its store: rank 0 writes, the others read. Ranks of readers are 0, 1, ..."""
    from tcomm.objects.codec import decode, encode

    count = member.world_size - 1
    if member.rank == 0:
        queue = MessageQueue(count, count, None, chunk_bytes, chunks, **options)
        member.store.set("handle", encode(queue.export_handle()).join())
    else:
        queue = MessageQueue.create_from_handle(decode(member.store.get("handle")), member.rank - 1)
    queue.wait_until_ready(20)
    return queue
