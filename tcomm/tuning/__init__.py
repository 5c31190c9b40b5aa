"""Which algorithm when: tables of measurements, and the pure function that reads them."""
