"""The contract between a worker and its child processes: mailbox, errors, rank logs, rendezvous."""
