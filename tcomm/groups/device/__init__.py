"""Device communicators: what a group coordinator runs its tensor collectives with."""
