from tests.groups.queue.peers import pair


def test_a_reader_sees_whether_a_chunk_has_come_and_how_many_were_taken():
    with pair(2) as (writer, first, second):
        sources = [reader._receiver.source for reader in (first, second)]
        assert [source.has_chunk() for source in sources] == [False, False]
        writer.enqueue("value")
        assert [source.has_chunk() for source in sources] == [True, True]
        assert first.dequeue(5) == "value"
        assert [source.has_chunk() for source in sources] == [False, True]
