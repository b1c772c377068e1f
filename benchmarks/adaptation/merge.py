def run(setup):
    raise SystemExit
