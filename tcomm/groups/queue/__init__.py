"""One writer, many readers: objects through a ring in shared memory, or an authenticated socket."""
