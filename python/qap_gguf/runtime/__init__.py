"""What the process runs on: loading order of libraries, devices, versions."""
