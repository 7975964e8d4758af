#ifndef ADAATTN_SERVER_METRIC_TABLE_H_
#define ADAATTN_SERVER_METRIC_TABLE_H_

// Every metric that the server exports, as data: the registry, the documentation and the checks of
// dashboards and alerts are made from this list. Label values are fixed here (one series each,
// there from the start), so that the number of series has a bound; none is ever a session.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace adaattn {

enum class MetricType : uint8_t { kCounter, kGauge, kHistogram };

struct MetricLabel {
  std::string name;
  std::vector<std::string> values;  // empty: one value, set at start (versions, device names)
};

struct MetricDescriptor {
  std::string name;  // with its prefix
  MetricType type = MetricType::kCounter;
  std::string help;
  std::vector<MetricLabel> labels;
  std::vector<double> buckets;  // kHistogram: upper bounds, without +Inf

  // Series in the exposition, those of histogram buckets, sum and count included.
  int64_t num_series() const;
};

const std::vector<MetricDescriptor>& MetricTable();
// The table as a JSON array of {name, type, help, labels, buckets}.
std::string MetricTableJson();

// Label values as indices, in the order of the table.
enum class RpcMethod : uint8_t {
  kOpenSession,
  kImportKv,
  kAttend,
  kAttendStream,
  kTruncateSession,
  kForkSession,
  kExportKv,
  kCloseSession,
  kKeepAlive,
  kListSessions,
  kUploadProfile,
  kGetProfile,
  kGetServerInfo
};
inline constexpr int kNumRpcMethods = 13;
const char* RpcMethodName(RpcMethod method);  // "OpenSession"

enum class Stage : uint8_t {
  kQueue,
  kCopyIn,
  kAppend,
  kScan,
  kSelect,
  kAttend,
  kMerge,
  kCopyOut,
  kSeal
};
inline constexpr int kNumStages = 9;
const char* StageName(Stage stage);  // "copy_in"

// What has a configured end, in the order of the label values of adaattn_limit.
enum class Limit : uint8_t {
  kQueuedTasks,
  kQueuedBytes,
  kInflightBytes,
  kSessions,
  kPoolBytes,
  kSealBacklogPages
};
inline constexpr int kNumLimits = 6;
inline constexpr int kNumHardLimits = 5;  // the leading ones: beyond them calls are refused
const char* LimitName(Limit limit);       // "queued_tasks"
using LimitValues = std::array<int64_t, kNumLimits>;

enum class WireTransport : uint8_t { kTcp, kUnix };
enum class WireDirection : uint8_t { kIn, kOut };

inline constexpr int kNumStatusCodes = 17;
const char* StatusCodeName(int code);  // "OK", "CANCELLED", ...; "UNKNOWN" where there is none

}  // namespace adaattn

#endif  // ADAATTN_SERVER_METRIC_TABLE_H_
