"""The protocol between a worker and its child processes: mailbox, errors, logs of ranks, rendezvous."""
