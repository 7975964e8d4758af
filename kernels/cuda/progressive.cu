#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/progressive.h"
#include "kernels/cuda/progressive_inst.h"
#include "kernels/cuda/progressive_workspace.h"

namespace adaattn {
namespace {

int32_t NumColumnTiles(const ProgressiveParams& params) {
  return CeilDiv(params.shape.group_size() * params.max_q_len, kTileColumns);
}
// Dense tails that prepare attends, a CTA each.
int32_t NumTails(const ProgressiveParams& params) {
  return params.num_sequences * params.shape.num_kv_heads * NumColumnTiles(params);
}

}  // namespace

void PlanProgressive(int32_t num_sms, ProgressiveParams* params) {
  params->num_sms = num_sms;
  const int32_t head_groups = CeilDiv(params->shape.num_kv_heads, kScanWarps);
  const int32_t tiles = NumColumnTiles(*params), tails = NumTails(*params);
  // Beside many tails an early scan would have these come late, behind all that it reads.
  params->early_scan = 4 * tails <= num_sms;
  int32_t ctas = ScanCtasPerSm(params->shape.head_dim) * num_sms;
  // A tail's CTA leaves room for one of the scan's less, which begins when the tail is through:
  // late for a long run of pages, in time for short ones.
  constexpr int64_t kShortRun = 4;
  const int64_t runs = int64_t{head_groups} * tiles * params->num_sequences *
                       CeilDiv(params->max_sealed, ScanPlaces(params->shape.num_kv_heads));
  if (params->early_scan && runs > kShortRun * ctas) ctas -= tails;
  params->scan_ctas = std::max(ctas / (head_groups * tiles), 1);
}

PageRun VisibleSealedPages(const ProgressiveSequence& sequence) {
  const ProgressiveSequence& s = sequence;
  const int32_t first = s.window > 0 ? std::max(s.q_start - s.window + 1, 0) / kPageTokens : 0;
  const int32_t end = std::min(s.num_sealed, (s.q_start + s.q_len - 1) / kPageTokens + 1);
  return PageRun{std::min(first, end), end};
}

void ScheduleScan(const ProgressiveParams& params, absl::Span<ProgressiveSequence> sequences,
                  ScanRun* runs) {
  int64_t total = 0;
  for (const ProgressiveSequence& s : sequences) {
    const PageRun pages = VisibleSealedPages(s);
    total += pages.end - pages.begin;
  }
  // A CTA takes several pages at once where it has few heads.
  const int32_t at_once = ScanPlaces(params.shape.num_kv_heads);
  const auto whole = [at_once](int64_t pages, int64_t among) {  // the length of a run
    const auto share = static_cast<int32_t>((pages + among - 1) / among);
    return std::max(CeilDiv(share, at_once), 1) * at_once;
  };
  const int32_t ctas = params.scan_ctas;
  // Behind many tails CTAs begin at different times: less is dealt out before.
  const bool late = NumTails(params) > 2 * params.num_sms;
  const int32_t long_run = whole(total * (late ? 6 : 7) / 8, ctas);
  int64_t rest = total;  // what long runs leave: they end with their sequences
  int32_t left = ctas;
  for (size_t i = 0; i < sequences.size() && left > 0; ++i) {
    const PageRun run = VisibleSealedPages(sequences[i]);
    const int32_t pages = run.end - run.begin, runs_of = std::min(CeilDiv(pages, long_run), left);
    rest -= std::min(pages, runs_of * long_run);
    left -= runs_of;
  }
  const int32_t short_run = whole(std::max<int64_t>(rest, 1), int64_t{kShortScanRuns} * ctas);
  int32_t next = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const PageRun pages = VisibleSealedPages(sequences[i]);
    sequences[i].scan_begin = next;
    for (int32_t begin = pages.begin; begin < pages.end; ++next) {
      const int32_t length = next < ctas ? long_run : short_run;
      ScanRun& run = runs[next];
      run.sequence = static_cast<int32_t>(i);
      run.page_begin = begin;
      run.page_end = begin = std::min(begin + length, pages.end);
    }
    sequences[i].num_scan_runs = next - sequences[i].scan_begin;
  }
  std::fill(runs + next, runs + NumScanRuns(params), ScanRun());
}

int64_t ProgressiveWorkspaceBytes(const ProgressiveParams& params) {
  return MakeProgressiveWorkspace(params).bytes;
}

absl::Status RunProgressive(const ProgressiveParams& params, cudaStream_t stream) {
  if (params.shape.group_size() * params.max_q_len > kMaxColumns) {
    return absl::UnimplementedError(absl::StrCat("progressive decode: group size ",
                                                 params.shape.group_size(), " x q_len ",
                                                 params.max_q_len, " exceeds ", kMaxColumns));
  }
  ProgressiveArgs args;
  static_cast<ProgressiveParams&>(args) = params;
  args.two_stage = params.two_stage && params.shape.group_size() * params.max_q_len <= kTileColumns;
  args.group = QueryGroup(params.shape.group_size());
  args.scan_places = ScanPlaces(params.shape.num_kv_heads);
  args.layout = MakePageLayout(params.shape, params.stored_bits);
  args.work = MakeProgressiveWorkspace(args);
  if (args.work.bytes > kMaxProgressiveWorkspace) {
    return absl::ResourceExhaustedError(
        absl::StrCat("progressive decode: ", params.num_sequences, " sequences of up to ",
                     params.max_sealed, " sealed pages need ", args.work.bytes,
                     " bytes of workspace; at most ", kMaxProgressiveWorkspace));
  }
  switch (params.shape.head_dim) {
    case 64:
      return RunProgressiveD64(args, stream);
    case 80:
      return RunProgressiveD80(args, stream);
    case 96:
      return RunProgressiveD96(args, stream);
    case 128:
      return RunProgressiveD128(args, stream);
    case 256:
      return RunProgressiveD256(args, stream);
    default:
      return absl::UnimplementedError(
          absl::StrCat("progressive decode: head_dim ", params.shape.head_dim));
  }
}

}  // namespace adaattn
