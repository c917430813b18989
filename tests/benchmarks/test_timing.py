import json

import pytest

from benchmarks.timing import check_json
from dsv3.errors import UserError


def test_results_replace_those_of_a_benchmark_and_no_other_file(tmp_path):
    check_json(None)
    check_json(tmp_path / "new.json")
    (tmp_path / "earlier.json").write_text(json.dumps({"conditions": {}, "shapes": []}, indent=2))
    check_json(tmp_path / "earlier.json")
    (tmp_path / "config.json").write_text('{"hidden_size": 256}')
    with pytest.raises(UserError, match=r"config\.json: is no benchmark's results and would be lost"):
        check_json(tmp_path / "config.json")
