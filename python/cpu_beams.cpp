// CpuBeams: the hypotheses of a beam search, with their addresses; and calls that need none of them.
#include "cpu_beams.h"

#include <pybind11/stl.h>

#include <vector>

#include "checks.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

void raise_beams(Status status, const char* where) {
    if (status == Status::bad_id) throw py::index_error(std::string(where) + ": " + sentence(status));
    raise_unless_ok(status, where);
}

void top_k(uintptr_t x, int64_t n, int64_t k, uintptr_t value, uintptr_t index) {
    constexpr const char* kWhere = "top_k";
    TopK args = {};
    args.x = pointer<const float>(x, 4, true, kWhere, "x");
    args.n = n;
    args.k = k;
    args.value = pointer<float>(value, 4, true, kWhere, "value");
    args.index = pointer<int64_t>(index, 8, true, kWhere, "index");
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        status = dqk::top_k(args);
    }
    raise_unless_ok(status, kWhere);
}

void beam_candidates(uintptr_t scores, uintptr_t running, int64_t sources, int64_t beams, int64_t n,
                     int64_t kept, uintptr_t value, uintptr_t beam, uintptr_t token, int threads) {
    constexpr const char* kWhere = "beam_candidates";
    const bool needed = sources > 0;
    BeamCandidates args = {};
    args.scores = pointer<const float>(scores, 4, needed, kWhere, "scores");
    args.running = pointer<const float>(running, 4, needed, kWhere, "running");
    args.sources = sources;
    args.beams = beams;
    args.n = n;
    args.kept = kept;
    args.value = pointer<float>(value, 4, needed, kWhere, "value");
    args.beam = pointer<int64_t>(beam, 8, needed, kWhere, "beam");
    args.token = pointer<int64_t>(token, 8, needed, kWhere, "token");
    args.threads = threads;
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        status = dqk::beam_candidates(args);
    }
    raise_unless_ok(status, kWhere);
}

void ban_repeats(uintptr_t tokens, int64_t rows, int64_t row_stride, int64_t length, int64_t size,
                 uintptr_t scores, int64_t n) {
    constexpr const char* kWhere = "ban_repeats";
    const bool needed = rows > 0;
    BanRepeats args = {};
    args.tokens = pointer<const int64_t>(tokens, 8, needed, kWhere, "tokens");
    args.rows = rows;
    args.row_stride = row_stride;
    args.length = length;
    args.size = size;
    args.scores = pointer<float>(scores, 4, needed, kWhere, "scores");
    args.n = n;
    raise_unless_ok(dqk::ban_repeats(args), kWhere);
}

// What a search is made of: its arrays, and the tokens that end a hypothesis.
struct Beams {
    BeamState state;
    std::vector<int64_t> end_tokens;
};

Beams make_beams(int64_t sources, int64_t beams, int64_t start, int64_t most, int64_t filling,
                 std::vector<int64_t> end_tokens, uintptr_t running, uintptr_t came_from, uintptr_t scores,
                 uintptr_t finished, uintptr_t finished_from, uintptr_t finished_scores,
                 uintptr_t finished_lengths, uintptr_t is_finished, uintptr_t improvable) {
    constexpr const char* kWhere = "CpuBeams";
    const bool needed = sources > 0;
    Beams made = {};
    BeamState& state = made.state;
    state.sources = sources;
    state.beams = beams;
    state.start = start;
    state.most = most;
    state.filling = filling;
    state.running = pointer<int64_t>(running, 8, needed, kWhere, "running");
    state.came_from = pointer<int32_t>(came_from, 4, false, kWhere, "came_from");
    state.scores = pointer<float>(scores, 4, needed, kWhere, "scores");
    state.finished = pointer<int64_t>(finished, 8, needed, kWhere, "finished");
    state.finished_from =
        pointer<int32_t>(finished_from, 4, state.came_from != nullptr, kWhere, "finished_from");
    state.finished_scores = pointer<float>(finished_scores, 4, needed, kWhere, "finished_scores");
    state.finished_lengths = pointer<int64_t>(finished_lengths, 8, needed, kWhere, "finished_lengths");
    state.is_finished = pointer<uint8_t>(is_finished, 1, needed, kWhere, "is_finished");
    state.improvable = pointer<uint8_t>(improvable, 1, needed, kWhere, "improvable");
    made.end_tokens = std::move(end_tokens);
    return made;
}

bool extend(const Beams& beams, int64_t length, int64_t kept, uintptr_t value, uintptr_t beam,
            uintptr_t token, uintptr_t ends, bool all_end, double divisor, double best_divisor, bool early,
            uintptr_t parents, uintptr_t tokens) {
    constexpr const char* kWhere = "CpuBeams.extend";
    const bool needed = beams.state.sources > 0;
    bool goes_on = false;
    BeamExtend args = {};
    args.state = beams.state;
    args.length = length;
    args.kept = kept;
    args.value = pointer<const float>(value, 4, needed, kWhere, "value");
    args.beam = pointer<const int64_t>(beam, 8, needed, kWhere, "beam");
    args.token = pointer<const int64_t>(token, 8, needed, kWhere, "token");
    args.ends = pointer<const uint8_t>(ends, 1, false, kWhere, "ends");
    args.end_tokens = beams.end_tokens.data();
    args.end_count = static_cast<int64_t>(beams.end_tokens.size());
    args.all_end = all_end;
    args.divisor = static_cast<float>(divisor);
    args.best_divisor = static_cast<float>(best_divisor);
    args.early = early;
    args.parents = pointer<int64_t>(parents, 8, needed, kWhere, "parents");
    args.tokens = pointer<int64_t>(tokens, 8, needed, kWhere, "tokens");
    args.goes_on = &goes_on;
    raise_beams(beam_extend(args), kWhere);
    return goes_on;
}

}  // namespace

void define_cpu_beams(py::module_& m) {
    m.def("top_k", &top_k, py::kw_only(), py::arg("x"), py::arg("n"), py::arg("k"), py::arg("value"),
          py::arg("index"), "The k largest of a row, in the order of torch.topk.");
    m.def("beam_candidates", &beam_candidates, py::kw_only(), py::arg("scores"), py::arg("running"),
          py::arg("sources"), py::arg("beams"), py::arg("n"), py::arg("kept"), py::arg("value"),
          py::arg("beam"), py::arg("token"), py::arg("threads"),
          "The best continuations over all beams of each source.");
    m.def("ban_repeats", &ban_repeats, py::kw_only(), py::arg("tokens"), py::arg("rows"),
          py::arg("row_stride"), py::arg("length"), py::arg("size"), py::arg("scores"), py::arg("n"),
          "Scores of what would repeat so many tokens in a row become -inf.");
    py::class_<Beams>(m, "CpuBeams", py::module_local(),  // a second copy of the core may be loaded
                      "Running and finished hypotheses of a beam search. Its arrays must stay alive.")
        .def(py::init(&make_beams), py::kw_only(), py::arg("sources"), py::arg("beams"), py::arg("start"),
             py::arg("most"), py::arg("filling"), py::arg("end_tokens"), py::arg("running"),
             py::arg("came_from"), py::arg("scores"), py::arg("finished"), py::arg("finished_from"),
             py::arg("finished_scores"), py::arg("finished_lengths"), py::arg("is_finished"),
             py::arg("improvable"))
        .def("extend", &extend, py::arg("length"), py::arg("kept"), py::arg("value"), py::arg("beam"),
             py::arg("token"), py::arg("ends"), py::arg("all_end"), py::arg("divisor"),
             py::arg("best_divisor"), py::arg("early"), py::arg("parents"), py::arg("tokens"),
             "One token further; whether the search goes on.");
}

}  // namespace dqk::binding
