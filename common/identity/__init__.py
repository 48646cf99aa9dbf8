"""Who is who in a federation: node keys, what a site asks for, and what the coordinator answers."""
