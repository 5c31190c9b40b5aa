"""A message that comes piece by piece, whenever somebody waits for more of it."""


class Coming:
    """`data` is other bytes where nothing has come; `arrived` lets what is asked for come, in pieces."""

    def __init__(self, message, piece):
        self.data = memoryview(bytearray(byte ^ 0xFF for byte in message))
        self.asked = []
        self._message = message
        self._piece = piece
        self._there = 0

    def arrived(self, nbytes):
        self.asked.append(nbytes)
        there = max(self._there, min(-(-nbytes // self._piece) * self._piece, len(self._message)))
        self.data[self._there : there] = self._message[self._there : there]
        self._there = there
        return there
