"""Measurements that others can repeat: acceptance, and the playground they run on."""
