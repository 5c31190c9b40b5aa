"""What compiled graphs call: ops of torch, and forms that have a gradient."""
