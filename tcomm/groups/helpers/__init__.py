"""Small functions that users of the group layer expect."""
