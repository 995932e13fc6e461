import sys

from chaos_tests.simulation.run import main

sys.exit(main())
