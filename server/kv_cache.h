#ifndef ADAATTN_SERVER_KV_CACHE_H_
#define ADAATTN_SERVER_KV_CACHE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "server/page_allocator.h"
#include "server/session.h"

namespace adaattn {

// What one append needs before it can run: pages behind the table's end, and a private copy of the
// open page where a fork shares it. Undone with its destruction unless committed.
struct AppendReservation {
  PageLease lease;  // first the copy of the open page (when copies_open_page), then new
  bool copies_open_page = false;
};

// The pages of sessions: page tables, copy-on-write, truncation, bases. Threads: the engine's only.
class KvCache {
 public:
  // Both outlive the cache.
  KvCache(Backend* backend, PageAllocator* allocator) : backend_(backend), allocator_(allocator) {}
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Pages for `append_len` more tokens, zeroed where another tenant wrote them; copies a shared
  // open page. Errors: kResourceExhausted; kUnavailable when the device is lost.
  absl::StatusOr<AppendReservation> ReserveAppend(const Session& session, int32_t layer,
                                                  int32_t append_len);
  // The page table as it will be after the append; valid until the next change of the layer.
  static void FillTable(const LayerState& state, const AppendReservation& reservation,
                        std::vector<PageId>* table);
  // The table of dense pages that hold every token as it came, the originals in the place of sealed
  // pages. Requires: the session keeps them.
  static void FillExactTable(const LayerState& state, const AppendReservation& reservation,
                             std::vector<PageId>* table);
  // Takes the pages into the table and counts the tokens.
  void CommitAppend(Session* session, int32_t layer, int32_t append_len,
                    AppendReservation reservation);

  // Drops tokens from `length` on in all layers; every layer has at least that many.
  // Returns the number of sealed pages that were decoded again. On an error nothing has changed.
  absl::StatusOr<int32_t> Truncate(Session* session, int64_t length);
  // Makes the fresh `branch` share all pages of `source`.
  void Share(const Session& source, Session* branch);
  // Tokens [begin, end) of the cache's positions: as they came where the session keeps the
  // originals of sealed pages, else sealed pages at their stored depth.
  absl::Status Read(const Session& session, int32_t layer, int64_t begin, int64_t end,
                    absl::Span<float> k, absl::Span<float> v);
  // A basis for pages sealed from here on.
  absl::Status LoadBasis(Session* session, int32_t layer, absl::Span<const float> mean,
                         absl::Span<const float> basis);
  // A block for a new basis of the session's shape, and its adoption as the newest one of a layer.
  absl::StatusOr<PageLease> ReserveBasis(const Session& session);
  void CommitBasis(PageLease lease, LayerState* state);
  // The runs that have pages.
  static absl::Span<const BasisRun> SealedRuns(const LayerState& state);
  // Gives pages that this lease took from another tenant zeros.
  absl::Status ZeroPages(const PageLease& lease);
  // Gives all pages back.
  void Release(Session* session);

  Backend* backend() { return backend_; }
  PageAllocator* allocator() { return allocator_; }

 private:
  // A sealed page that a truncation cuts, on its way to being an open one.
  struct Reopening {
    int32_t layer = 0;
    PageId original = kNoPage;  // in the exact tier: copied; else the task decodes
    ReopenTask task;
  };
  std::vector<Reopening> Reopenings(const Session& session, int64_t length) const;
  // Fills new pages, task.target of each, or takes none.
  absl::Status Reopen(const Session& session, std::vector<Reopening>* reopenings);

  Backend* const backend_;
  PageAllocator* const allocator_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_KV_CACHE_H_
