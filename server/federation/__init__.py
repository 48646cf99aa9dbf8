"""A federation over a network: its authority, its sites, and the services of the coordinator."""
