"""The embedded MQTT 3.1.1 broker: one pure core with two edges, loopback TCP here and virtual time in the simulator."""
